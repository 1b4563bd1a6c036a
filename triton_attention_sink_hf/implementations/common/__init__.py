"""What every Triton backend uses: a call as kernels see it, launches, device functions. No attention kernel."""
