from tritflow import assets as assets
from tritflow.config import CalibrationConfig as CalibrationConfig
from tritflow.config import ConfigError as ConfigError
from tritflow.config import DistillationConfig as DistillationConfig
from tritflow.config import Recipe as Recipe
from tritflow.config import TernaryConfig as TernaryConfig
from tritflow.modules.ternary_linear import TernaryLinear as TernaryLinear
from tritflow.pipelines.compare import compare as compare
from tritflow.pipelines.generate import generate as generate
from tritflow.pipelines.loading import configure_ as configure_
from tritflow.pipelines.loading import load_pipeline as load_pipeline
from tritflow.pipelines.optimize import deoptimize as deoptimize
from tritflow.pipelines.optimize import optimize as optimize
from tritflow.pipelines.plugin import TritflowConfig as TritflowConfig
from tritflow.pipelines.quantize import quantize as quantize

__version__: str
__all__: list[str]
