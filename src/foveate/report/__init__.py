"""Data in; tables, figures and pictures out."""
