# Included by the Makefile: the verbs of whoever teaches. What they write is kept in class/, which
# git ignores and `make clean` leaves alone.
.PHONY: assignment grade release
EXAMPLE := NAME=effective_batch ROSTER=class/roster.csv SECRET=class/secret.txt
# $(call named,VERB,VARIABLES,EXAMPLE): stop in the recipe, so that --dry-run still shows it all.
named = @$(foreach name,$(2),test -n "$($(name))" || { echo "make $(1) must name $(name), got none;\
	for example: make $(1) $(3)" >&2; exit 2; };)

assignment: $(READY) ## instructor's verb: build an assignment (NAME=effective_batch; ROSTER=, SECRET=, OUT=)
	$(call named,assignment,NAME $(if $(ROSTER)$(SECRET),ROSTER SECRET),$(EXAMPLE))
	@echo "Building the assignment $(NAME)"
	@$(BIN)/python -m instructor.build "$(NAME)" --out "$(or $(OUT),class/$(NAME))" \
		$(if $(ROSTER),--roster "$(ROSTER)") $(if $(SECRET),--secret-file "$(SECRET)")

grade: $(READY) ## instructor's verb: grade a class (NAME= SUBMISSIONS= ROSTER= SECRET=; OUT=, ARGS=)
	$(call named,grade,NAME SUBMISSIONS ROSTER SECRET,$(EXAMPLE) SUBMISSIONS=submissions.zip)
	@echo "Grading $(NAME)"
	@$(BIN)/python -m instructor.grade "$(NAME)" "$(SUBMISSIONS)" --roster "$(ROSTER)" \
		--secret-file "$(SECRET)" --out "$(or $(OUT),class/$(NAME)/graded/grades.csv)" $(ARGS)

release: $(READY) ## instructor's verb: pack the course without instructor/ into build/course-students.zip
	@echo "Packing what students get"
	@$(BIN)/python -m instructor.release
