"""The papers' equations: tensors in, tensors out; torch and the standard library only."""
