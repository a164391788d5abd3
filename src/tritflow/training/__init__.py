"""How the small FLUX and its VAE are trained: from nothing but the built-in world, with one command.

`python -m tritflow.training --out runs/small-flux` (or `make train`) renders the data, trains the VAE, then the text
encoders and the transformer together, distils guidance into the transformer's guidance embedding, and writes a stock
`FluxPipeline` folder. One CUDA GPU is enough; `torchrun --nproc-per-node N` uses more.
"""
