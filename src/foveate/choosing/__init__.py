"""The model-free half of pruning: ask a method, check its answer, gather what stays; imports no transformers."""
