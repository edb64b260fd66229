"""The imports that every rank of a test needs; ranks are forked from a process that has loaded this module."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (deepspeed.initialize would import it late)
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

import forge.train.worker  # noqa: F401
