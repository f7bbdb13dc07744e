from chestct.cli import main

main()
