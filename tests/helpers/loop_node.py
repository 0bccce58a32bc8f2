"""A custom node of the tests, copied into a server: a second round of the nodes before it, as loops of packs make it.

It copies the sampler and the prompt schedule of its latent while the graph runs, and has ComfyUI show the copies by
the nodes that they are copies of.
"""

from comfy_execution.graph_utils import GraphBuilder


class OneMoreRound:
    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {"latent": ("LATENT", {"rawLink": True})},
            "hidden": {"dynprompt": "DYNPROMPT"},
        }
    )
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "test"

    def run(self, latent, dynprompt):
        graph, copies = GraphBuilder(), []
        sampler = latent[0]
        schedule = dynprompt.get_node(sampler)["inputs"]["positive"][0]
        for name in (schedule, sampler):
            original = dynprompt.get_node(name)
            copy = graph.node(original["class_type"], name, **original["inputs"])
            copy.set_override_display_id(name)
            copies.append(copy)
        copies[1].set_input("positive", copies[0].out(0))
        copies[1].set_input("seed", dynprompt.get_node(sampler)["inputs"]["seed"] + 1)
        return {"result": (copies[1].out(0),), "expand": graph.finalize()}


NODE_CLASS_MAPPINGS = {"OneMoreRound": OneMoreRound}
