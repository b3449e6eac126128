"""How batches are put together: *which* samples (sampling), *where* they live (sources), the loader."""
