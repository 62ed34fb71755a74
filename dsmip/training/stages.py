"""The two training stages and the evaluation of a run, each as one function that knows nothing of where it runs."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsmip import distributed
from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.collate import gold_rows
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Table
from dsmip.encoders.clip import compile_towers
from dsmip.errors import UserError
from dsmip.evaluation.preparation import with_has_image
from dsmip.runs.run import Run
from dsmip.training.batches import CachedSource, StreamSource, is_held_out
from dsmip.training.fusion.fit import FitScores, fit_gate
from dsmip.training.loop import Context
from dsmip.training.trainer import MinedSource, TrainResult, train
from dsmip.training.validation.hard_negatives import alike_groups
from dsmip.training.validation.subset import validation_between
from dsmip.training.validation.validation import CachedValidation, EncodingValidation, SplitFeatures, Validation
from dsmip.units.fusion.matcher import FusedMatcher
from dsmip.units.matcher import Matcher

CPU = torch.device("cpu")
_SURELY_ENOUGH = 1000  # expected mentions of a stage: it then has some, however they are drawn


def held_out_rows(dataset: Dataset, share: float) -> Tensor:
    """bool [M], True for training mentions that stage one leaves to stage two, chosen by gold entity."""
    return torch.tensor([is_held_out(mention.entity_id, share) for mention in dataset.mentions("train")])


def train_part(run: Run, part: str, context: Context) -> TrainResult:
    """Stage one of one part: from cached features when its towers are frozen and are enough, else from shards.

    What has nothing to train is validated once. The finished part is written into the run by rank 0.
    """
    config = run.config.train_of(part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)  # every worker starts from the same weights
        matcher = run.system.build_part(part, run.config, with_encoder=True).to(context.device)
    assert matcher.fixed_batches() is None, "check_training refuses it"
    source: MinedSource | None = None
    validate: Validation
    if matcher.encoder_trains() or matcher.reads_items:
        if config.compile:
            compile_towers(matcher)
        source = StreamSource(run.dataset, "train", run.collator(part), config, run.config.seed, run.config.held_out)
        validate = EncodingValidation(run.dataset, run.collator(part), context)
        several = config.epochs > config.validate_every or config.validate_entities or config.hard_negatives
        validate.keeps_trunks = bool(several)  # what one validation alone sees is not looked at again
        golds = gold_rows(run.dataset, "train")
    else:
        features, kb = (run_features(run, part, split, matcher, context) for split in ("validation", KB))
        mentions: Table | None = None
        if any(parameter.requires_grad for parameter in matcher.parameters()):
            seen = ~held_out_rows(run.dataset, run.config.held_out)
            mentions = run_features(run, part, "train", matcher, context).rows(seen)
            golds = gold_rows(run.dataset, "train")[seen]
            source = CachedSource(mentions, kb, golds, config, run.config.seed)
        of_validation = SplitFeatures(features, gold_rows(run.dataset, "validation"))
        validate = CachedValidation(of_validation, with_has_image(kb, run.dataset), context, mentions)
    if source is None:
        result = TrainResult([dict(validate(matcher))], 0)
    else:
        steps = run.config.part(part).checkpoint_steps
        mine = _miner(validate, golds, run.dataset, config)
        between = validation_between(validate, config.validate_entities, run.config.seed)
        seed = run.config.seed
        result = train(matcher, source, config, context, validate, mine, between, seed=seed, checkpoint_steps=steps)
    if distributed.rank() == 0:
        run.save_part(part, matcher, {"best": result.best, "history": result.history})
    return result


def start_whole(run: Run, config: ExperimentConfig) -> Matcher:
    """A gated system at the start of stage two: units of the trained experts, a fresh gate drawn from the seed.

    Raises:
        UserError: An expert is not trained yet.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        matcher = run.system.build_whole(config)
    run.load_experts(matcher, config)
    return matcher


def check_held_out(dataset: Dataset, share: float) -> None:
    """Checks that both stages have training mentions to contrast. Reads them only where that is in doubt.

    Raises:
        UserError: One of them has fewer than two.
    """
    total = dataset.num_mentions("train")
    if share == 0 or min(share, 1 - share) * total > _SURELY_ENOUGH:
        return
    held_out = int(held_out_rows(dataset, share).sum())
    for stage, count, remedy in (("two", held_out, "larger"), ("one", total - held_out, "smaller")):
        if count < 2:
            raise UserError(
                f"held_out {share:g} leaves stage {stage} {count} of {total} training mentions; "
                f"train into a new run with a {remedy} share, or with 0 (both stages see all)"
            )


def stage_two_split(run: Run, mentions: Table) -> SplitFeatures:
    """What stage two trains on: the held-out training mentions, or all of them when none are held out.

    `check_held_out` says whether there are any.
    """
    golds = gold_rows(run.dataset, "train")
    if run.config.held_out == 0:
        return SplitFeatures(mentions, golds)
    rows = held_out_rows(run.dataset, run.config.held_out)
    return SplitFeatures(mentions.rows(rows), golds[rows])


def train_whole(
    matcher: Matcher,
    train_split: SplitFeatures,
    validation: SplitFeatures,
    kb: Table,
    dataset: Dataset,
    config: TrainConfig,
    context: Context,
    *,
    seed: int,
    stop_epoch: int | None = None,
    kept: FitScores | None = None,
) -> TrainResult:
    """Stage two of a gated system on cached features (DSMIP eq. 18): gate and units train, the towers are not there.

    kb: features of the whole kb `with_has_image`. kept: as of `fit_gate`.
    """
    if isinstance(matcher, FusedMatcher):
        return fit_gate(
            matcher, train_split, validation, kb, config, context, seed=seed, stop_epoch=stop_epoch, kept=kept
        )
    source = CachedSource(train_split.mentions, kb, train_split.gold_row_M, config, seed)
    validate = CachedValidation(validation, kb, context, train_split.mentions)
    mine = _miner(validate, train_split.gold_row_M, dataset, config)
    between = validation_between(validate, config.validate_entities, seed)
    return train(matcher, source, config, context, validate, mine, between, seed=seed, stop_epoch=stop_epoch)


def _miner(
    validation: Validation, gold_row_N: Tensor, dataset: Dataset, config: TrainConfig
) -> Callable[[Matcher], Tensor] | None:
    """What finds hard negatives of the training mentions; None where none are asked for."""
    if not config.hard_negatives:
        return None
    validation.keeps_index, group_E = True, alike_groups(dataset)
    return lambda matcher: validation.hard_negatives(matcher, gold_row_N, group_E, config.hard_negatives)


def run_features(run: Run, part: str, split: str, matcher: Matcher, context: Context) -> Table:
    """Cached features of a part's encoder on a split or the kb. Only rank 0 computes them; the others wait for it."""

    collator, device, done = run.collator(part), context.device, 0
    total = run.dataset.num_entities if split == KB else run.dataset.num_mentions(split)

    def working(count: int) -> None:
        nonlocal done
        context.alive()
        if count:  # else another process computes them
            done += count
            context.features_done(done, total)
        distributed.any_worker(True, device)

    def alone(_: int) -> None:
        context.alive()

    if distributed.rank() == 0:
        run.cache.ensure(part, split, matcher, run.dataset, collator, device, working, context.warn)
        distributed.any_worker(False, device)
    else:
        while distributed.any_worker(False, device):  # not a barrier: that one waits in vain after a while
            context.alive()
    return run.cache.table(part, split, matcher, run.dataset, collator, device, alone, context.warn)
