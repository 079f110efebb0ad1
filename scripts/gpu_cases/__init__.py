"""Networks, loops and cases of `scripts/measure_gpu.py`."""
