"""Optimizers, learning-rate schedules, fp32 master weights and the scale of fp16 losses."""
