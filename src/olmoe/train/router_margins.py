"""How far a router's choices are from changing, which distinguishes a decisive router from one that tosses coins.

Shapes legend: N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.model import RouterOutput
from olmoe.runtime import no_grad


@no_grad
def router_margins(router: RouterOutput) -> Tensor:
    """Two means over tokens, (2,): by how much the first expert's probability is above the second's, and that of the
    last expert that was chosen above the first one that was not.

    Where there is no second expert, or none was left out, that one's probability is 0.
    """
    p_NE = router.logits.float().softmax(dim=-1)
    chosen_NK = p_NE.gather(1, router.expert_ids)
    left_out_N = p_NE.scatter(1, router.expert_ids, 0.0).amax(dim=1)
    second_N = chosen_NK[:, 1] if chosen_NK.shape[1] > 1 else left_out_N
    return torch.stack(((chosen_NK[:, 0] - second_N).mean(), (chosen_NK[:, -1] - left_out_N).mean()))
