"""The names of kohya's sd-scripts, of the kohya_ss GUI's files, and those that musubi-tuner adds."""

from lorasmith.config.other_trainers.name import CHECKPOINTS, EPOCHS, Name, Tool, missing, needless
from lorasmith.config.other_trainers.words import as_settings

ALPHA = "default: the rank"
NETWORK_KEYS = {
    "algo": "adapter", "factor": "adapter.factor", "include_patterns": "targets.include",
    "exclude_patterns": "targets.exclude",
}  # fmt: skip
OPTIMIZER_KEYS = {
    "weight_decay": "optimizer.weight_decay", "betas": "optimizer.beta1 optimizer.beta2", "eps": "optimizer.eps",
    "momentum": "optimizer.momentum",
}  # fmt: skip


def network_args(text: str) -> str:
    """algo=lokr conv_dim=4 dora_wd=True … -> what to type."""
    pairs = text.split()
    if "dora_wd=true" in text.lower():
        pairs = ["algo=DoRA", *(pair for pair in pairs if not pair.startswith("algo="))]
    typed = as_settings(" ".join(pairs), NETWORK_KEYS)
    return typed if "conv_dim=" not in text else f"--targets.preset all {typed}"


def optimizer_args(text: str) -> str:
    """weight_decay=0.1 … -> what to type."""
    return as_settings(text, OPTIMIZER_KEYS)


def text_encoder(text: str) -> str:
    """A file of an encoder, or whether it is trained -> what to type."""
    return "--encoders owner/name" if text not in ("", "true", "false") else f"--text_encoder.train {text or 'true'}"


KOHYA = Tool("kohya's name", "kohya", "--", (
    Name("pretrained_model_name_or_path", "--model",
         "folder, single file or hub id of any of [these families](../models.md)"),
    Name("train_data_dir", "--data.folder",
         "or as the first argument; the same `10_name` folders, and pictures may lie in it directly as well"),
    needless("caption_extension caption_extention", "captions are read from `.txt`, else from `.caption`",
         is_flag=False),
    Name("enable_wildcard", "--data.caption_lines first",
         "captions of several lines are joined into one; `first` takes the first line, as sd-scripts does",
         is_flag=True),
    Name("resolution max_resolution", "--data.resolution",
         "one number, the side of a square; default: the model's own"),
    needless("enable_bucket bucket_reso_steps min_bucket_reso max_bucket_reso",
         "buckets are always on, in the model's own multiple", is_flag=False),
    needless("cache_latents cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk",
         "latents and captions are always encoded once, and kept in memory"),
    Name("output_dir output_name", "--output", "the run folder, which must not exist yet unless `--resume` is given"),
    Name("max_train_steps", "--steps", "default: 100 epochs"),
    Name("max_train_epochs epoch", "--steps", EPOCHS, is_other_value=True),
    Name("train_batch_size", "--batch_size"),
    Name("gradient_accumulation_steps", "--grad_accumulation_steps"),
    Name("learning_rate unet_lr", "--learning_rate", "default 5e-4", default="2e-6"),
    Name("text_encoder_lr", "--text_encoder.train true --text_encoder.learning_rate",
         "the text encoders are [not trained](../inputs/text_encoder.md) otherwise"),
    needless("network_train_unet_only", "the text encoders are not trained by default"),
    missing("stop_text_encoder_training", "they are trained to the end, at their own rate",
            "--text_encoder.learning_rate 5e-5"),
    missing("block_lr", "all blocks have one rate; patterns leave layers out", "--targets.exclude up_blocks"),
    missing("highvram lowram", "for a GPU", "--offloading true", is_flag=True),
    missing("dynamo_backend dynamo_mode"),
    missing("num_timestep_buckets preserve_distribution_shape timestep_boundary"),
    missing("wandb_api_key wandb_run_name", "TensorBoard's events", "--tensorboard true"),
    missing("huggingface_repo_id huggingface_token huggingface_repo_type huggingface_path_in_repo"),
    needless("attn_mode sage_attn", "attention is always torch's own", is_flag=False),
    needless("task", "the family is read from the model", is_flag=False),
    needless("skip_cache_check", "latents are kept in memory"),
    Name("network_module", "--adapter", default="none"),
    Name("network_args", "--adapter",
         "`algo=loha` is `--adapter LoHa`, `algo=diag-oft` is OFT, `dora_wd=True` is DoRA (with "
         "`wd_on_output=True`), `conv_dim` is `--targets.preset all` at one rank for all layers",
         to=network_args),
    Name("LoRA_type", "--adapter", "of the GUI's files", shown="`LoRA_type`"),
    Name("network_dim", "--adapter.rank", "default 8", default="4"),
    Name("network_alpha", "--adapter.alpha", ALPHA, default="1"),
    missing("conv_dim conv_alpha", "convolutions have the same rank as all other layers", "--targets.preset all"),
    Name("network_weights", "--existing_lora"),
    needless("dim_from_weights", "the rank is always that of `existing_lora`"),
    Name("optimizer_type", "--optimizer"),
    Name("optimizer_args", "--optimizer.weight_decay",
         "each optimizer has [settings of its own](../optimizers.md)", to=optimizer_args),
    missing("use_8bit_adam", "optimizers keep their state in 32 bits", "--optimizer AdamW", is_flag=True),
    Name("lr_scheduler", "--schedule"),
    Name("lr_warmup_steps", "--schedule.warmup", "in steps"),
    missing("lr_scheduler_num_cycles lr_scheduler_power", "the rate falls once", "--schedule cosine"),
    Name("loss_type", "--loss", "`l2` is MSE, `l1` is L1, `huber` and `smooth_l1` are near Huber and SmoothL1",
         default="l2"),
    Name("mixed_precision", "--training_dtype", "default bf16", default="no"),
    Name("full_bf16", "--lora_dtype bf16", "the default; the optimizer works on fp32 copies", is_flag=True),
    missing("full_fp16", "adapters are in bf16 or fp32", "--lora_dtype bf16", is_flag=True),
    Name("save_precision", "--lora_dtype", "default bf16"),
    Name("fp8_base fp8_scaled", "--base_dtype fp8", is_flag=True),
    Name("gradient_checkpointing", "--gradient_checkpointing", "on by default"),
    Name("max_grad_norm", "--max_grad_norm", "1 in both"),
    Name("seed", "--seed", "default 0", default="random"),
    needless("v2 v_parameterization zero_terminal_snr", "what the model predicts is read from it"),
    needless("xformers sdpa mem_eff_attn flash_attn split_attn", "attention is always torch's own"),
    needless("no_half_vae", "pictures are encoded in fp32"),
    needless("max_data_loader_n_workers persistent_data_loader_workers vae_batch_size",
         "pictures are encoded once, before the first step", is_flag=False),
    Name("sample_prompts", "--sampling.prompts",
         "the prompts themselves, and not a file; generated before and after training", is_other_value=True),
    Name("sample_every_n_steps", "--sampling.every"),
    Name("sample_every_n_epochs", "--sampling.every", "in steps, not in epochs", is_other_value=True),
    Name("save_state save_state_on_train_end", "--checkpoints.minutes 5", "the default: checkpoints to resume from",
         is_flag=True),
    missing("save_every_n_steps save_every_n_epochs", CHECKPOINTS, "--checkpoints.steps 500"),
    missing("save_last_n_steps_state save_last_n_epochs_state save_last_n_steps save_last_n_epochs",
         "a number of checkpoints, not of steps; default 2", "--checkpoints.keep 2"),
    Name("resume", "--resume", "without a value: the same command again, or the run folder", shown="`--resume STATE`"),
    Name("log_with logging_dir", "--tensorboard true", "in the run folder"),
    Name("dataset_config config_file", "SETTINGS.toml", "as the first argument, in place of the folder"),
    Name("blocks_to_swap", "--offloading true", "all blocks, for a GPU", is_nearest=True, is_other_value=True),
    Name("timestep_sampling weighting_scheme", "--times", "default uniform"),
    Name("logit_mean", "--times logit_normal --times.mean"),
    Name("logit_std", "--times logit_normal --times.std"),
    Name("sigmoid_scale", "--times logit_normal --times.std"),
    missing("discrete_flow_shift", "the shift is the model's own scheduler's"),
    missing("noise_offset multires_noise_iterations ip_noise_gamma adaptive_noise_scale"),
    missing("min_snr_gamma debiased_estimation_loss scale_v_pred_loss_like_noise_pred", "each time has weight 1"),
    missing("min_timestep max_timestep"),
    missing("clip_skip"),
    missing("max_token_length", "longer captions are cut, with a warning"),
    missing("shuffle_caption keep_tokens caption_tag_dropout_rate weighted_captions", "captions are used as they are"),
    missing("caption_dropout_rate caption_dropout_every_n_epochs"),
    missing("flip_aug color_aug random_crop face_crop_aug_range", "pictures are cropped about the centre"),
    missing("reg_data_dir prior_loss_weight", "without an effect on the training, it measures what is forgotten",
         "--data.drift pictures"),
    missing("masked_loss alpha_mask", is_flag=True),
    missing("network_dropout scale_weight_norms"),
    missing("block_dims block_lr_zero_threshold down_lr_weight mid_lr_weight up_lr_weight",
         "one rank and rate for all layers; patterns choose layers", "--targets.include up_blocks"),
    missing("torch_compile", is_flag=True),
    missing("num_processes", "`torchrun --nproc-per-node 2 -m lorasmith train …`: [several processes](../scaling.md)"),
    Name("dit ckpt", "--model", "musubi-tuner's: a folder, single file or hub id"),
    Name("text_encoder", "--text_encoder.train true", "musubi-tuner's is a file: here it is in `--encoders`",
         to=text_encoder),
    Name("vae t5 t5xxl clip_l ae", "--encoders owner/name",
         "the folder or hub id that has all that a single file lacks", is_other_value=True),
    Name("image_directory image_dir", "--data.folder", "of a data set's file; or as the first argument"),
    missing("num_repeats", "folders named `10_name` are repeated ten times"),
    Name("metadata_title metadata_author training_comment", "",
         "`lorasmith metadata FILE --set key=value` adds to a file"),
))  # fmt: skip
