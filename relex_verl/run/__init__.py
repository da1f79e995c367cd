"""One training run, whatever its host: configuration, schedule, cuts, decisions, output. It imports no verl."""

from relex_verl.run import logs

logs.configure()  # here, so that it holds in every process of a run: the driver's and the ranks'
