"""Everything that knows ComfyUI's models: causal attention on Wan, sampling through its guiders, loading."""
