"""How batches are put together: which samples, where they live, and the loader."""
