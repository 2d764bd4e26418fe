"""The MLPs into the space of the prototypes (methods 6.1)."""

import torch
from torch import nn

from protoclip_scale.models.batch_norm import GroupBatchNorm
from protoclip_scale.recipe import schema


class PrototypeHead(nn.Module):
    """[B, in_dim] un-normalised tower output -> [B, dim]: hidden layers of Linear, batch norm, ReLU, then Linear."""

    def __init__(self, in_dim: int, settings: schema.PrototypeHeads, groups: int):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(settings.hidden_layers):
            layers += [nn.Linear(in_dim, settings.hidden_dim), GroupBatchNorm(settings.hidden_dim, groups), nn.ReLU()]
            in_dim = settings.hidden_dim
        self.layers = nn.Sequential(*layers, nn.Linear(in_dim, settings.dim))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)
