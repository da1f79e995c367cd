"""How to ingest, and what kind of trajectory that makes of a run's checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from relex_verl.offline.ingest.errors import IngestError
from relex_verl.offline.ingest.layout import Layout
from relex_verl.reporting.provenance import Checkout
from relex_verl.reporting.records import RecordError
from relex_verl.trajectory.kinds import QUANTIZATIONS, Kind, kind_of

__all__ = ["AS_IT_COMES", "Options"]

TRAJECTORIES = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Options:
    """How to ingest.

    Attributes:
        trajectory: "bf16", "fp32", or "auto": bf16 where all checkpoints are bfloat16, else fp32, so that nothing is lost. A
            few tensors of another type among bfloat16 ones are followed in float32 of their own.
        quantization: of fp32: "int8", "int4", "none", or "auto": none for what `relex-verl checkout` wrote (it has been
            quantised once) and for a few tensors among bfloat16 ones, else int8.
        allow_pickle: use checkpoints that need unpickling.
        any_base: do not compare the weights of the first checkpoint with those of the base.
        accept_jump: do not compare how far each checkpoint lies from the one before.

    Raises:
        IngestError: another trajectory or quantization.
    """

    trajectory: str = "auto"
    quantization: str = "auto"
    allow_pickle: bool = False
    any_base: bool = False
    accept_jump: bool = False

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--trajectory", self.trajectory, TRAJECTORIES),
            ("--quantization", self.quantization, ("auto", *QUANTIZATIONS)),
        ):
            if value not in known:
                raise IngestError(f"{option} {value}: give one of {', '.join(known)}")

    def kind(self, layout: Layout, checkpoint: Path, begun: Kind | None) -> Kind:
        """The kind for checkpoints of this layout, of which one is given; `begun` is that of the steps before them.

        Raises:
            IngestError: they would be rounded because those before them were bfloat16.
        """
        checkout = _checkout(checkpoint)
        # The only exact checkouts are those of bf16 alone; what they hold beyond it is the base's.
        exact = layout.exact_in_bf16() or (checkout is not None and checkout.max_error == 0 and not checkout.encodings)
        if begun is not None and begun.trajectory == "bf16" and self.trajectory == "auto":
            if exact or layout.exact_in_bf16(begun.own):
                return begun
            raise IngestError(
                "the steps recorded before are bfloat16, these checkpoints are not: checkpoints of one run must have one "
                "type; convert them, leave some out with --steps, or round them with --trajectory bf16"
            )
        if begun is not None:
            return begun
        few = not exact and self.trajectory != "fp32" and layout.exact_in_bf16(layout.wide)
        trajectory, quantization = self.trajectory, self.quantization
        if trajectory == "auto":
            trajectory = "bf16" if exact or few else "fp32"
        if quantization == "auto":
            quantization = "none" if few or checkout is not None else "int8"
        own = layout.wide if few else []
        return kind_of(trajectory, quantization).beside(dict.fromkeys(own, kind_of("fp32", quantization).name))

    def allow(self, kind: Kind) -> bool:
        """Whether a trajectory that was begun as this kind may be gone on with."""
        return self.trajectory in ("auto", kind.trajectory) and (
            kind.quantization is None or self.quantization in ("auto", kind.quantization)
        )


AS_IT_COMES = Options()


def _checkout(folder: Path) -> Checkout | None:
    """What `relex-verl checkout` says of what it wrote, if it did: it alone says how far off its weights can be."""
    try:
        return Checkout.read(folder / "relex.json")
    except (OSError, RecordError):
        return None
