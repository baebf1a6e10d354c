# Included by the Makefile: the verbs of whoever teaches.
.PHONY: assignment grade release

assignment: $(READY) ## instructor's verb: build an assignment (NAME=effective_batch; ROSTER=, SECRET=, OUT=)
	@echo "Building the assignment $(NAME)"
	@$(BIN)/python -m instructor.build $(NAME) --out "$(or $(OUT),build/$(NAME))" \
		$(if $(ROSTER),--roster "$(ROSTER)") $(if $(SECRET),--secret-file "$(SECRET)")

grade: $(READY) ## instructor's verb: grade a class (NAME= SUBMISSIONS= ROSTER= SECRET=; OUT=, ARGS=)
	@echo "Grading $(NAME)"
	@$(BIN)/python -m instructor.grade "$(NAME)" "$(SUBMISSIONS)" --roster "$(ROSTER)" \
		--secret-file "$(SECRET)" --out "$(or $(OUT),build/graded/$(NAME)/grades.csv)" $(ARGS)

release: $(READY) ## instructor's verb: pack the course without instructor/ into build/course-students.zip
	@echo "Packing what students get"
	@$(BIN)/python -m instructor.release
