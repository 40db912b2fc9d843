"""The console command where it is not on the path: python -m dit_jax.launch COMMAND [options]."""

from dit_jax.launch import console

if __name__ == "__main__":
    console.main()
