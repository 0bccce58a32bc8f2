"""A custom node of the tests, copied into a server: out of memory at one point of the run that its MODEL is used in."""

import gc
import json
import sys

import comfy.patcher_extension
import torch

STATE = {"point": None, "seen": {}}


def reached(kind):
    number = STATE["seen"].get(kind, 0)
    STATE["seen"][kind] = number + 1
    if STATE["point"] == (kind, number):
        STATE["point"] = None
        raise torch.OutOfMemoryError("Allocation on device (put in by a test)")


def wrap(owner, name, kind):
    real = getattr(owner, name)

    def replaced(*args, **kwargs):
        reached(kind)
        return real(*args, **kwargs)

    if not hasattr(real, "of_test"):
        replaced.of_test = True
        setattr(owner, name, replaced)


def forward(executor, *args, **kwargs):
    reached("forward")
    return executor(*args, **kwargs)


class FaultPoint:
    """Reads the point (kind, number) from the file `plan`, and writes into `report` what the run before went through
    and how many bytes of tensors this process holds.
    """

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"model": ("MODEL",), "plan": ("STRING", {}), "report": ("STRING", {})}}
    )
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"
    IS_CHANGED = classmethod(lambda cls, **inputs: float("nan"))

    def run(self, model, plan, report):
        (streaming,) = [m for name, m in sys.modules.items() if name.endswith(".model_patches.streaming")]
        (writer,) = [m for name, m in sys.modules.items() if name.endswith(".model_patches.video_writer")]
        wrap(streaming.StreamDecoder, "submit", "decode")
        wrap(writer.EncodedWriter, "write", "save")
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        with open(report, "w") as out:
            json.dump({"seen": STATE["seen"], "held": sum(held.values())}, out)
        STATE["seen"], STATE["point"] = {}, tuple(json.load(open(plan)))
        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "fault_point", forward)
        return (model,)


NODE_CLASS_MAPPINGS = {"FaultPoint": FaultPoint}
