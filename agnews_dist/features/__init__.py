"""The frozen part's output, computed once and cached on the device, in host memory or on disk."""
