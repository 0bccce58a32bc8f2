"""Diagonal Distillation: streams video chunk by chunk from causal few-step Wan models.

ComfyUI loads this folder as a package and calls `comfy_entrypoint`. Anything else that imports it by accident, such as
a test runner looking for packages, gets an empty module.
"""

WEB_DIRECTORY = "./web"
MINIMUM_COMFYUI = (0, 24, 1)


def _require_comfyui() -> None:
    """Raise ImportError with the version needed when this ComfyUI is too old."""
    needed = ".".join(map(str, MINIMUM_COMFYUI))
    try:
        from comfyui_version import __version__ as found
    except ImportError:
        found = "of unknown version"
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if numbers < MINIMUM_COMFYUI:
        raise ImportError(
            f"Diagonal Distillation needs ComfyUI {needed} or newer; this one is {found}. Update ComfyUI."
        )


if __package__:
    _require_comfyui()
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
