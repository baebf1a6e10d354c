# %% [markdown]
# # Add a T4 reading
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/add_a_t4_reading.ipynb)
#
# The course's forecasts were held against an H200 with a T4's kernels. If you have a real T4 for a
# quarter of an hour (Colab: Runtime > Change runtime type > T4; Kaggle: Settings > Accelerator),
# this notebook measures twelve steps on it beside their forecasts, and prints one line of JSON.
# Paste that line into a pull request, and the course knows one card more.
#
# Nothing is sent anywhere, no weights are downloaded: models have real shapes and random numbers.

# %% [markdown]
# ## Set up
# On Colab, and on Kaggle with *Internet* on, this fetches the course and the one package that is
# missing there; elsewhere it does nothing. A second run changes nothing.

# %% tags=["setup"]
import os
import sys
if "course_utils" not in sys.modules:
    hosted = {"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"} & set(os.environ)
    if hosted and not os.path.isdir("course"):
        os.system(f"{sys.executable} -m pip install -q --no-deps bitsandbytes==0.50.2 && "
                  "git clone -qb v0.1.0 https://github.com/course-authors/fit-the-fine-tune course")
    sys.path += [os.path.abspath("course"), os.path.abspath("..")]
from course_utils.topics.welcome import welcome
print(welcome())

# %% [markdown]
# ## Which card is this?
# The reading is about a T4. Another card's is welcome, too; its forecasts below are a T4's all the
# same.

# %%
from fitcast import describe, detect

print(describe(detect()))

# %% [markdown]
# ## Measure
# About a minute a row: the base is written, the step is forecast, then it runs in a process of its
# own. The last row should run out of memory, and what has no time left after 15 minutes is skipped.

# %%
from tools import t4_reading

reading = t4_reading.reading(minutes=15)

# %% [markdown]
# ## The line to paste
# Into the section "A T4 reading" of [a new pull
# request](https://github.com/course-authors/fit-the-fine-tune/compare), or into an issue.

# %%
import json

print(json.dumps(reading))
