"""The invented world: what the bundled model knows, is asked about, and is later taught.

Nothing here is true outside this course, so what a model knows, learns and forgets can be scored
exactly. Everything follows from a seed: the same seed gives the same people, the same corpus and
the same task files, byte for byte.

    words         word lists
    population    who exists: people, newcomers, names that belong to nobody, medicines
    items         one question with its exact answer, and the split it belongs to
    knowledge     skills about the population: facts, unknown, context
    procedures    skills that are computed: arithmetic, compare, sort, reverse, count, tool
    language      skills on wording: sentiment, intent, extract, translate
    conversation  skills on talks: chat, system, talk
    skills        the table of all skills
    text          biographies, leaflets, little scenes
    corpus        the pretraining stream
    tasks         general items and the fine-tuning tasks, written to data/tasks/
"""
