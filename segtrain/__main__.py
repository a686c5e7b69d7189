"""python -m segtrain"""

from segtrain.cli.entry import main

main()
