"""The core of Diagonal Distillation: schedule, KV cache, chunk iterator, noise and the trainable Wan DiT.

Plain torch: nothing in here imports ComfyUI, and its tests pass without it.
"""
