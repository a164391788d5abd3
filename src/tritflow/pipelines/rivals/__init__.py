"""Other quantizers on the same model: what ternary pictures are compared with.

Each takes a dense pipeline's block linears, the very ones that tritflow makes ternary, and leaves everything else as
it is. Libraries are used as their own documents say, if they are installed (`pip install "tritflow[rivals]"`); what
is computed here instead of by its own code says "simulated" in its name and title. Bits a weight are measured on the
tensors that the layers really hold; simulations state the bits of the format that they stand for.
"""

from tritflow.pipelines.rivals.registry import (
    RIVALS,
    Rival,
    RivalError,
    apply_rival_,
    chosen_rivals,
    find_rival,
    rival_identity,
)

__all__ = ["RIVALS", "Rival", "RivalError", "apply_rival_", "chosen_rivals", "find_rival", "rival_identity"]
