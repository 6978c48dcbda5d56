"""Experiments: train one model under each regulariser on data with wrong labels, and record what each does."""

from mgs_core.experiments.compare import compare as compare
from mgs_core.experiments.data import Dataset as Dataset
from mgs_core.experiments.data import load_dataset as load_dataset
from mgs_core.experiments.recipes import RECIPES as RECIPES
from mgs_core.experiments.recipes import Recipe as Recipe
from mgs_core.experiments.settings import Settings as Settings
from mgs_core.experiments.training import train as train
