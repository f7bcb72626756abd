"""Training: optimizer, schedule, clipping, text, and the loop."""

from npnorm.training.adamw import AdamW
from npnorm.training.clip import clip, global_norm
from npnorm.training.gradients import loss_and_grads
from npnorm.training.loop import Recipe, Step, evaluate, generate, train
from npnorm.training.schedule import warmup_cosine
from npnorm.training.text import Characters, batch, language_reference, unigram_entropy

__all__ = [
    "AdamW",
    "Characters",
    "Recipe",
    "Step",
    "batch",
    "clip",
    "evaluate",
    "generate",
    "global_norm",
    "language_reference",
    "loss_and_grads",
    "train",
    "unigram_entropy",
    "warmup_cosine",
]
