"""One module a notebook, `lesson_NN.py`: the checks, hints and quizzes of `notebooks/NN_*.ipynb`.

A lesson holds two tuples, `EXERCISES` (of `labkit.exercises.Exercise`) and, if it asks any,
`QUIZZES` (of `labkit.exercises.Quiz`). Answers to exercises never stand here, only the code that
judges them and wrong answers that a learner is likely to give; solutions stand in the master
notebooks.
"""
