"""The names of dtypes in settings."""

from typing import Literal

DtypeName = Literal["bf16", "fp32"]
TrainingDtypeName = Literal["bf16", "fp32", "none"]
BaseDtypeName = Literal["none", "int8", "fp8", "nf4"]
