"""The step `tune`: experts of other settings, features, the rungs of its trials, and the judgement of the winner."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dsmip.planning import amounts
from dsmip.planning.probing.parts import EncoderCosts, WholeCosts
from dsmip.planning.probing.probe import Cost
from dsmip.planning.schedule import Outcome, rung_sizes
from dsmip.planning.steps import DECODED_BYTES, TILE_BYTES, Found, Frame, no_node

_REMEDY = "set tune.resources.cpu higher so that fewer trials run at once, or tune.trials lower"


def tuning(frame: Frame, trials: int, variants: Sequence[str]) -> Found:
    """Stage two; nothing of a system without a gate.

    Args:
        trials: As they will be drawn.
        variants: The parts that experts of other settings are of.
    """
    whole, plan, counts = frame.costs.whole, frame.config.tune, frame.counts
    if whole is None:
        return [], []
    asked = plan.resources
    node = frame.machines.node_for(asked.cpu, asked.gpu)
    if node is None:
        return [], [no_node("a trial", asked.cpu, asked.gpu, "tune.resources")]

    def together(costs: Mapping[str, Cost], held: int) -> Outcome:
        works = [frame.work(name, cost, node, asked.cpu, asked.gpu, held) for name, cost in costs.items()]
        return frame.outcome(works)

    outcomes, about = list[Outcome](), list[str]()
    if variants:
        parts = [frame.costs.parts[name] for name in variants]
        costs = {f"{part.name} {number}": frame.training(part) for number, part in enumerate(parts)}
        outcomes.append(together(costs, max(map(frame.held_by, parts))))
        about.append(f"{len(parts)} experts of other settings")
    if missing := missing_features(frame):
        costs = {
            name: amounts.encoding(encoder, counts, ("train", "validation", "kb")) for name, encoder in missing.items()
        }
        outcomes.append(together(costs, max(each.module for each in missing.values()) + DECODED_BYTES))
        about.append(f"features of {', '.join(missing)}")
    held, before = held_by_trial(frame, whole), 0
    sizes = rung_sizes(trials, len(plan.rungs), plan.reduction)
    for size, epochs in zip(sizes, plan.rungs, strict=True):
        cost = amounts.trial(frame.config, whole, counts, epochs - before)
        outcomes.append(together({str(number): cost for number in range(size)}, held))
        before = epochs
    outcomes.append(together({"judge": amounts.judging(frame.config, whole, counts)}, held))
    about.append(f"{' + '.join(map(str, sizes))} trials to {', '.join(map(str, plan.rungs))} epochs")
    most = Outcome(
        sum(each.seconds for each in outcomes),
        max(each.memory for each in outcomes),
        max(each.at_once for each in outcomes),
    )
    largest = frame.work("", Cost(), node, asked.cpu, asked.gpu, held).memory
    card, wrong = frame.card("a trial", held, asked.gpu, node, "tune")
    (step,), problems = frame.whole("tune", most, largest, node, "; ".join(about), _REMEDY)
    return [replace(step, gpu_bytes=card)], [*problems, *wrong]


def missing_features(frame: Frame) -> dict[str, EncoderCosts]:
    """Encoders whose tables stage one has not made."""
    encoders, parts = amounts.feature_encoders(frame.config, frame.costs), frame.costs.parts
    return {
        name: encoder
        for name, encoder in encoders.items()
        if name not in parts or not amounts.training_tables(parts[name])
    }


def held_by_trial(frame: Frame, whole: WholeCosts) -> int:
    """Bytes of a trial beside a worker that has nothing to do; its features are memory-mapped."""
    counts, prepared = frame.counts, whole.prepared
    held = whole.num_bytes.while_training + prepared["entities"].of(*counts.items("kb")) + TILE_BYTES
    held += sum(prepared["mentions"].of(*counts.items(split)) for split in ("train", "validation"))
    learned = counts.mentions["train"] * (frame.config.held_out or 1.0)
    held += sum(
        amounts.kept_bytes(frame.config, whole, counts, each) for each in (learned, counts.mentions["validation"])
    )
    return held + (whole.step.num_bytes or 0 if whole.step else 0)
