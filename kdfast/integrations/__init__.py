"""Drop-ins: other libraries' names, arguments, reductions and ignored rows, with kdfast's operators under them.

A file for each library: `trl` (its trainers use `kdfast.linear_kd_loss`), `liger`, `torchtune`, `textbrewer`. Only `trl`
imports the library that it is named after. sentence-transformers' losses are terms: `kdfast.objective.SentenceMSE` and
`MarginMSE`. `docs/migrate.md` has before and after of each, and how their conventions differ.
"""
