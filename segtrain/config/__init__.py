"""Every option: its type, its default, what it means and what is allowed. Imports nothing heavy.

The YAML files in configs/ choose values for these dataclasses. A wrong key, type, value or combination is refused when
the options are composed, before anything is built.
"""

from segtrain.config.augmentation import AugmentationConfig
from segtrain.config.chosen_checkpoint import checkpoint_line, checkpoint_path
from segtrain.config.combined import check_channels
from segtrain.config.commands import (
    CheckConfig,
    CommandConfig,
    CompareConfig,
    ConvertConfig,
    ConvertLabelsConfig,
    InfoConfig,
    PlanCommandConfig,
    ReplayConfig,
    ReportConfig,
    RunsConfig,
    ShowConfig,
    StreetsCommandConfig,
    SuspectsConfig,
    TrainConfig,
    VerifyConfig,
    WeightsConfig,
    names_pictures,
    refuse_other_task,
    refuse_pictures,
    run_folder,
)
from segtrain.config.dataset import (
    DATASET_CONFIGS,
    IGNORE_INDEX,
    CityscapesConfig,
    CocoStuffConfig,
    DatasetConfig,
    FolderConfig,
    ImageNetConfig,
    KittiConfig,
    MixtureConfig,
    StreetsConfig,
    VistasConfig,
    channels_of,
    classifies,
)
from segtrain.config.inference import InferenceConfig
from segtrain.config.keys import LENGTHS, flatten, is_safe, shared_values
from segtrain.config.loader import LoaderConfig
from segtrain.config.logging import LoggingConfig
from segtrain.config.loss import LossConfig
from segtrain.config.model import ModelConfig
from segtrain.config.optimizer import OptimizerConfig
from segtrain.config.options import option, option_of, require
from segtrain.config.plan import PlanConfig
from segtrain.config.results import ENGINES, EvaluateConfig, ExportConfig, PredictConfig, ScoreConfig, SubmitConfig
from segtrain.config.sampling import SamplingConfig
from segtrain.config.schedule import ScheduleConfig
from segtrain.config.stored import adopt_earlier, dataset_schema, store_rules, trained, with_defaults
from segtrain.config.trainer import TrainerConfig

# fmt: off
__all__ = [
    "AugmentationConfig", "CheckConfig", "CityscapesConfig", "CocoStuffConfig", "CommandConfig", "CompareConfig",
    "ConvertConfig", "ConvertLabelsConfig", "DATASET_CONFIGS", "DatasetConfig", "ENGINES", "EvaluateConfig",
    "ExportConfig", "FolderConfig", "IGNORE_INDEX", "ImageNetConfig", "InferenceConfig", "InfoConfig", "KittiConfig",
    "LENGTHS", "LoaderConfig", "LoggingConfig", "LossConfig", "MixtureConfig", "ModelConfig", "OptimizerConfig",
    "PlanCommandConfig", "PlanConfig", "PredictConfig", "ReplayConfig", "ReportConfig", "RunsConfig", "SamplingConfig",
    "ScheduleConfig", "ScoreConfig", "ShowConfig", "StreetsCommandConfig", "StreetsConfig", "SubmitConfig",
    "SuspectsConfig", "TrainConfig", "TrainerConfig", "VerifyConfig", "VistasConfig", "WeightsConfig", "adopt_earlier",
    "channels_of", "check_channels", "checkpoint_line", "checkpoint_path", "classifies", "dataset_schema", "flatten",
    "is_safe", "names_pictures", "option", "option_of", "refuse_other_task", "refuse_pictures", "require", "run_folder",
    "shared_values", "store_rules", "trained", "with_defaults",
]
# fmt: on
