"""`python -m sora_jax` is the console script `sora-jax`."""

from sora_jax.cli import entry_point

if __name__ == "__main__":
    entry_point()
