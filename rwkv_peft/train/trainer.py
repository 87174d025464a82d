"""Lightning's Trainer with the options that every run has."""

from __future__ import annotations

import logging
import warnings

import pytorch_lightning as pl

from .setup import RunSetup


def make_trainer(run: RunSetup, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Return the trainer of a run."""
    # Lightning's hints are about loggers and workers that are chosen on purpose; its errors are exceptions
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    for library in ("lightning_fabric", "pytorch_lightning.strategies"):  # "Initializing distributed", of every process
        logging.getLogger(library).setLevel(logging.WARNING)
    return pl.Trainer(
        **run.compute.trainer,
        max_epochs=run.config.epoch_count,
        accumulate_grad_batches=run.config.mini_bsz,
        use_distributed_sampler=False,  # the data set has the rows of its rank only; Lightning's would shuffle them again
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
