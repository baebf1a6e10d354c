# Included by the Makefile: the verbs of whoever teaches. What they write is kept in class/, which
# git ignores and `make clean` leaves alone.
.PHONY: assignment grade release
EXAMPLE := NAME=effective_batch ROSTER=class/roster.csv SECRET=class/secret.txt
# $(call named,VERB,VARIABLES,EXAMPLE): stop in the recipe, so that --dry-run still shows it all.
named = @$(foreach name,$(2),test -n "$($(name))" || { echo "make $(1) must name $(name), got none;\
	for example: make $(1) $(3)" >&2; exit 2; };)

# The whole environment where it is set up; else a small one, so that the first assignment is there
# in a minute. The lessons' own needs (torch) are none of an assignment's.
TEACHING_NEEDS := ipython jinja2 jupytext nbformat
TEACHING := $(if $(wildcard $(READY)),.venv,.venv-teaching)
TEACHING_READY := $(if $(wildcard $(READY)),$(READY),$(subst .venv/,.venv-teaching/,$(READY)))
TEACH := $(TEACHING)/bin/python

ifneq ($(TEACHING),.venv)
$(TEACHING_READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $(PYTHON) is not: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up $(TEACHING), for the instructor's verbs (the first time: less than a minute)"
	@$(PYTHON) -m venv $(TEACHING)
	@sed -nE 's/^([^ #]+==[^ ]+( ;[^\\]+)?) \\$$/\1/p' $(LOCK) > $(TEACHING)/pins.txt
	@$(TEACH) -m pip --disable-pip-version-check --quiet install --constraint $(TEACHING)/pins.txt \
		$(TEACHING_NEEDS)
	@touch $@
endif

assignment: $(TEACHING_READY) ## instructor's verb: build an assignment (NAME=effective_batch; ROSTER=, SECRET=, OUT=)
	$(call named,assignment,NAME $(if $(ROSTER)$(SECRET),ROSTER SECRET),$(EXAMPLE))
	@echo "Building the assignment $(NAME)"
	@$(TEACH) -m instructor.build "$(NAME)" --out "$(or $(OUT),class/$(NAME))" \
		$(if $(ROSTER),--roster "$(ROSTER)") $(if $(SECRET),--secret-file "$(SECRET)")

grade: $(TEACHING_READY) ## instructor's verb: grade a class (NAME= SUBMISSIONS= ROSTER= SECRET=; OUT=, ARGS=)
	$(call named,grade,NAME SUBMISSIONS ROSTER SECRET,$(EXAMPLE) SUBMISSIONS=submissions.zip)
	@echo "Grading $(NAME)"
	@$(TEACH) -m instructor.grade "$(NAME)" "$(SUBMISSIONS)" --roster "$(ROSTER)" \
		--secret-file "$(SECRET)" --out "$(or $(OUT),class/$(NAME)/graded/grades.csv)" $(ARGS)

release: $(TEACHING_READY) ## instructor's verb: pack the course without instructor/ into build/course-students.zip
	@echo "Packing what students get"
	@$(TEACH) -m instructor.release
