"""Who is measured. Each peer is a function that loads it and returns a `Peer`."""

from npnorm.studies.accuracy.peers.from_equinox import equinox
from npnorm.studies.accuracy.peers.from_flax import flax
from npnorm.studies.accuracy.peers.from_keras import keras
from npnorm.studies.accuracy.peers.from_torch import torch
from npnorm.studies.accuracy.peers.naive import naive
from npnorm.studies.accuracy.peers.own import own
from npnorm.studies.accuracy.peers.peer import Peer, Results

PEERS = {"npnorm": own, "naive": naive, "torch": torch, "flax": flax, "keras": keras, "equinox": equinox}

__all__ = ["PEERS", "Peer", "Results"]
