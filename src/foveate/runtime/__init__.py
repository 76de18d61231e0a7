"""The only rooms that touch a running model; everything they change is put back when their handle stops."""
