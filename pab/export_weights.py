"""Export only the weights of a checkpoint: `python -m pab.export_weights FILE --out FILE`.

A training state or a released checkpoint may contain more than the weights, such as the state of
the optimizer. The exported file contains only the weights and their metadata. LoRA adapters are
merged, and wrapper prefixes that all names have are removed. For a training state with an average
(EMA), the averaged weights are exported.
"""

from __future__ import annotations

from pathlib import Path

from pab.core.config import CommandParser
from pab.core.errors import InputError, run_cli


def export_weights(source: Path, out: Path, dtype: str) -> None:
    """Write the weights of ``source`` to ``out`` (``.safetensors`` or ``.pth``) in ``dtype``.

    Raises:
        InputError: ``dtype`` is unknown, the weights cannot be read or written, or a weight is not
            finite in ``dtype``.
    """
    import torch  # --help does not need it

    from pab.core.checkpoints import model_state, read_checkpoint, save_weights
    from pab.core.devices import dtype_of
    from pab.core.progress import progress

    checkpoint = read_checkpoint(source)
    wanted = dtype_of(dtype)
    state = {}
    found = model_state(checkpoint, source)
    for name, tensor in progress(found.items(), "converting weights", "tensors"):
        state[name] = tensor.to(wanted) if tensor.is_floating_point() else tensor
        if not bool(torch.isfinite(state[name]).all()):
            problem = f"holds a value that is too large for {dtype}"
            if not bool(torch.isfinite(tensor).all()):
                problem = "expected finite weights, found NaN or infinity"
            raise InputError(source, problem, item=f"tensor {name!r}")
    metadata = checkpoint.get("metadata")
    save_weights(out, state, {**(metadata if isinstance(metadata, dict) else {}), "dtype": dtype})


def main(argv: list[str] | None = None) -> None:
    """Export the weights of a checkpoint."""
    parser = CommandParser(prog="python -m pab.export_weights")
    output = parser.groups["output"]
    parser.add_argument("checkpoint", type=Path, help="checkpoint to read")
    output.add_argument("--out", type=Path, required=True, help="file to write")
    output.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="data type of the weights"
    )
    args = parser.parse_args(argv)
    export_weights(args.checkpoint, args.out, args.dtype)
    print(f"{args.checkpoint} -> {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_cli(main)
