"""The inputs of ComfyUI's own training node."""

from lorasmith.config.other_trainers.name import Name, Tool, needless

COMFYUI = Tool("ComfyUI's name", "comfyui", "", (
    Name("model", "--model", "[a folder, checkpoint, hub id](../inputs/model.md); in Python a pipeline too",
         shown="`model` (MODEL)"),
    Name("latents", "--data.folder",
         "the folder of pictures, or as the first argument; in Python [`latents`](../inputs/latents.md), "
         "`{\"samples\": …}` as it is, in the model's own scale",
         is_other_value=True, shown="`latents` (LATENT)"),
    Name("positive", "--data.folder",
         "text files beside the pictures; in Python [`positive`](../inputs/positive.md), `[tensor, dict]` pairs "
         "as they are",
         is_other_value=True, shown="`positive` (CONDITIONING)"),
    Name("batch_size", "--batch_size"),
    Name("grad_accumulation_steps", "--grad_accumulation_steps"),
    Name("steps", "--steps"),
    Name("learning_rate", "--learning_rate"),
    Name("seed", "--seed"),
    Name("rank", "--adapter.rank", "in Python [`rank`](../inputs/rank.md)"),
    Name("optimizer", "--optimizer"),
    Name("loss_function", "--loss", "in Python [`loss_function`](../inputs/loss_function.md)"),
    Name("training_dtype", "--training_dtype"),
    Name("lora_dtype", "--lora_dtype"),
    Name("gradient_checkpointing", "--gradient_checkpointing"),
    Name("checkpoint_depth", "--checkpoint_depth"),
    Name("offloading", "--offloading"),
    Name("quantized_backward", "--quantized_backward"),
    Name("algorithm", "--adapter", "in Python [`algorithm`](../inputs/algorithm.md)"),
    Name("existing_lora", "--existing_lora"),
    needless("bucket_mode", "buckets are always on; in Python [`bucket_mode`](../inputs/bucket_mode.md)"),
    needless("bypass_mode", "adapters always run separately from the layers"),
))  # fmt: skip
