"""lm-evaluation-harness over our engine: importing this registers the model `olmoe` with it.

>>> import lm_eval, olmoe.evaluate                                                     # doctest: +SKIP
>>> lm_eval.simple_evaluate(model="olmoe", model_args={"pretrained": "allenai/OLMoE-1B-7B-0924"}, tasks=["arc_easy"])
... # doctest: +SKIP
"""

from olmoe.evaluate.model import OlmoeLM

__all__ = ["OlmoeLM"]
