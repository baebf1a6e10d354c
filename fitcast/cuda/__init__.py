"""CUDA's side of memory: kernels, libraries and the caching allocator, as rules."""
