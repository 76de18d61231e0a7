"""Pure tensor functions: tensors to one number per token (scores), numbers to indices (subsets). No model, no state."""
