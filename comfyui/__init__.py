"""lorasmith's nodes for ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .data_nodes import LorasmithBuckets, LorasmithDataset, LorasmithLoadDataset, LorasmithSaveDataset
from .nodes import LorasmithLoadLora, LorasmithLossGraph, LorasmithSaveLora, LorasmithTrainLora

WEB_DIRECTORY = "./web"


class LorasmithExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LorasmithTrainLora,
            LorasmithSaveLora,
            LorasmithLoadLora,
            LorasmithLossGraph,
            LorasmithDataset,
            LorasmithBuckets,
            LorasmithSaveDataset,
            LorasmithLoadDataset,
        ]


async def comfy_entrypoint() -> LorasmithExtension:
    return LorasmithExtension()
