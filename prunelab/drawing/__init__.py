"""Pictures that the library itself draws: a traced network, the course of a pruning run; ``style`` is their look."""
