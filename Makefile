# vmirror: everything is made from here. `make help` lists the targets.
