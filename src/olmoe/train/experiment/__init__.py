"""Experiments: arms that differ in one thing, trained with several seeds, compared by pairs of equal seeds.

`definition` reads the TOML file, `runs` lays out the training runs, `reuse` takes over those that another experiment
trained, `schedule` trains what is left in processes of their own (`worker`), `results` reads what was trained,
`statistics` compares, `figure` and `table` show it.
"""
