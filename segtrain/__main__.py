"""python -m segtrain"""

from segtrain.cli import main

main()
