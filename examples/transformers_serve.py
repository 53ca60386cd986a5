"""`transformers serve` with the package's OLMoE classes: packed folders, the C++ kernels, the router in fp32.

python examples/transformers_serve.py serve FOLDER --device cpu --port 8000
"""

import transformers
from transformers.cli.transformers import main

import olmoe
import olmoe.hf

olmoe.hf.register()  # configuration and tokenizer
transformers.OlmoeForCausalLM = olmoe.OlmoeForCausalLM  # where `serve` looks the model's class up
main()
