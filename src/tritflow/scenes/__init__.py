"""The built-in world: coloured, textured shapes in relation to each other.

`world` says what exists, `render` draws it, `grammar` captions it, `detector` reads a picture back, `rules` decides
whether a picture shows what its prompt asks for, and `fidelity` says what a round trip leaves of it. The room imports
nothing else of the house.
"""

from tritflow.scenes.detector import Detection, detect, object_mask
from tritflow.scenes.fidelity import GHOSTS, marked, texture_contrast, weakest
from tritflow.scenes.grammar import GENEVAL_TAGS, TAGS, Clause, Prompt
from tritflow.scenes.held_out import evaluation_prompts, scene_of
from tritflow.scenes.render import SceneBatch, render
from tritflow.scenes.rules import Verdict, judge
from tritflow.scenes.training_set import training_captions, training_examples
from tritflow.scenes.world import COLORS, SHAPES, TEXTURES, Object, Scene

__all__ = [
    "COLORS",
    "GENEVAL_TAGS",
    "GHOSTS",
    "SHAPES",
    "TAGS",
    "TEXTURES",
    "Clause",
    "Detection",
    "Object",
    "Prompt",
    "Scene",
    "SceneBatch",
    "Verdict",
    "detect",
    "evaluation_prompts",
    "judge",
    "marked",
    "object_mask",
    "render",
    "scene_of",
    "texture_contrast",
    "training_captions",
    "training_examples",
    "weakest",
]
